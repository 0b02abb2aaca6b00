"""What we do to this kernel and what we read from it: mounts, disk images, ids, cgroups, journal, doctor.

Imports the floor only; engine, dyno, supervisor and cli import it.
"""
