"""What tests share; tests/README.md says which of it does what."""
