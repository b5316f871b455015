"""Fine-tuning: strategies of transfer learning, and classifiers on frozen features."""
