"""What shows itself as a table: printed, and in a notebook."""

from abc import abstractmethod

from bn_lightning.reports.table import Table

__all__ = ["Tabled"]


class Tabled:
    """A result that is read as one table.

    Example:
        >>> class Sizes(Tabled):
        ...     def table(self):
        ...         return Table("sizes", ("layer",), [("conv1",)])
        >>> print(Sizes())
        sizes
          layer
         ───────
          conv1
    """

    __slots__ = ()

    @abstractmethod
    def table(self) -> Table:
        """Put it into a table."""

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
