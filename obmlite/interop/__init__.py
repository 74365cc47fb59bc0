"""Other libraries' formats and interfaces, each optional."""
