"""Scores of new data: trained detectors, and the files, pages and heat maps of `dxmi score`."""
