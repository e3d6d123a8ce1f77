"""Photos: any source -> DatasetDict -> memory-mapped pixels."""
