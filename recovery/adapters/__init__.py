"""One module per outside thing; failures leave as values or as errors of ours."""
