"""The papers' experiments. Its commands run as files, and as modules: python -m bench.paper.nlg."""
