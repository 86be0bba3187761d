"""The notebooks run headless, the report, predictions as files."""
