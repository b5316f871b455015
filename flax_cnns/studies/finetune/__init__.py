"""Fine-tuning: strategies, each as runs, and classifiers on frozen features."""
