"""`python -m evaluation.report`: see evaluation/report/page.py."""

import sys

from evaluation.report.page import main

main(sys.argv[1:])
