"""From files of answers to scores, submissions and reports."""
