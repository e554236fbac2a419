"""Anomaly models: the networks of SimSID and SQUID, their signals and calibration, and plain baselines."""
