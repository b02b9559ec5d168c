"""The registry in MariaDB: what every registry promises, on a real server."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from gateway.registry.mysql import MySQLRegistry
from tests import mariadb
from tests.registry.claims import ClaimsMixin
from tests.registry.contract import ContractMixin, RegistryMixin
from tests.registry.mysql_case import make


class MySQLMixin(RegistryMixin):
    def set_up_database(self) -> None:
        self.url = mariadb.server().fresh()

    def make(self) -> MySQLRegistry:
        return make(self.url, self.clock)


class MySQLContractTests(MySQLMixin, ContractMixin, SynchronousTestCase):
    pass


class MySQLClaimsTests(MySQLMixin, ClaimsMixin, SynchronousTestCase):
    pass
