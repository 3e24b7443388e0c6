"""`diffc checkpoint export`: a calibration in the layouts of other tools."""
