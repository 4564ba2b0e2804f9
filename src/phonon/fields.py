"""The fields of models: each defines the state of its values, and how states merge.

A field is an annotation, or the value of an attribute, or both (then it has a default for type
checkers, so that messages need not have it)::

    class PageViews(Model, name="page_views"):
        user: ID[str]
        views: Sum[int] = Sum()
        recent: Window[str] = Window(10)
"""

from phonon._models.field import Field
from phonon._models.gathered import ID, Custom, Distinct, ListAppend, SetAppend
from phonon._models.numeric import Count, Counter, Diff, Mean, Stats, Sum, Summary
from phonon._models.ordered import (
    AllOf,
    AnyOf,
    First,
    Latest,
    Max,
    Min,
    Timestamp,
    TopK,
    WindowedList,
)

#: The short name of `WindowedList`.
Window = WindowedList

__all__ = [
    "ID",
    "AllOf",
    "AnyOf",
    "Count",
    "Counter",
    "Custom",
    "Diff",
    "Distinct",
    "Field",
    "First",
    "Latest",
    "ListAppend",
    "Max",
    "Mean",
    "Min",
    "SetAppend",
    "Stats",
    "Sum",
    "Summary",
    "Timestamp",
    "TopK",
    "Window",
    "WindowedList",
]
