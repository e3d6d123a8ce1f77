"""Load photos from any source as a DatasetDict, and cache their pixels."""
