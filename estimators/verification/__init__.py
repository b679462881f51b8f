"""Verification: a fresh receiver decodes what was sent, and an auditor works every figure out again."""
