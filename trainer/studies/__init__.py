"""Studies: the same training repeated with one setting changed, as in the paper's ablations."""
