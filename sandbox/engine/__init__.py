"""What makes containers: the embedded OCI engine and Docker, behind one small Protocol.

Imports host, policy and the floor; dyno and above import it. Only docker.py imports the docker package.
"""
