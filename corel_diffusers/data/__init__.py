"""Photos: any source -> DatasetDict -> cached pixels."""
