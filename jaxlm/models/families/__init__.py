"""Model families as data: functions that return a spec at the published sizes."""
