"""What a bundle costs and what it lost: latency, accuracy, reports and plots, without torch."""
