"""Fine-tuning: strategies of transfer learning, each as runs, and classifiers on frozen features."""
