"""A report as one page of HTML that asks nothing of the network, and as a part of a notebook."""
