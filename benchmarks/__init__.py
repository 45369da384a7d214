"""What a bundle costs and what it keeps: text, accuracy, latency, host, plots and the report."""
