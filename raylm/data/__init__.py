"""Rows in, token batches out. Import from the module that defines a thing."""
