"""Training: the data, the loop, the run folder, the report. Needs `pip install 'jaxattn[train]'`."""
