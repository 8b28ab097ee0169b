"""Times in statements."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, Interval, literal_column

SECOND: ColumnElement[timedelta] = literal_column("interval '1 second'", Interval)
DAY: ColumnElement[timedelta] = literal_column("interval '1 day'", Interval)
