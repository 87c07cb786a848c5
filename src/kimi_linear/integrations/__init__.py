"""Where other packages meet ours; each subpackage needs the third party that it is named after."""
