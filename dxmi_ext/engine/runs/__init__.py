"""Parts of a run: its settings as text, identity, folder, rollbacks, stopping, report and model card."""
