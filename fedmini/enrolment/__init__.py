"""A device's own folder: who it is, whom it believes, what it agreed to and what has left it, between runs.

DIR/device.key (PKCS8, 0600)   DIR/login.key (the same, for servers)   DIR/device.pub   the public halves of both
DIR/certificate.json           the operator's word that the device key is enrolled
DIR/enrolled.pub               DIR/rotations.json   DIR/operator.pub       from the operator key of then to that of now
DIR/revocations.json           the newest list seen; `null` before the first
DIR/manifests/HASH.json        what it agreed to; HASH.withdrawn where it left the run, for good
DIR/ledger.jsonl               what has left it, in all runs
DIR/device.toml                the owner's limits, where there is one
DIR/next/                      only while several files are put in place

Whatever a server plays back, none of it goes back to an earlier state. A private key never enters a repr or an error.
"""

from fedmini.enrolment.enrolled import Enrolment
from fedmini.enrolment.folder import enrol, new_login, opened

__all__ = ["Enrolment", "enrol", "new_login", "opened"]
