"""Labels that are one class, several classes or numbers, and the metrics of each.

labels      what labels of a dataset and of a run are; standardised numbers
scores      average precision, R² and mean absolute error
measures    names of metrics, and how they are written
"""
