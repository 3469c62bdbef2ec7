"""Coterie: train together, keep data apart."""
