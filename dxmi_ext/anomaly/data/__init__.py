"""Reading images and rows of numbers with and without defects, and synthetic defects."""
