"""A test bench for Intel TME and MKTME: see README.md."""
