"""Plain rows and arrays in; tables, figures and HTML out. Knows no BatchNorm."""
