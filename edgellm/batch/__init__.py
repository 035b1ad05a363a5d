"""Files of requests, answered into files of results: on this machine, or on a cluster's. Needs the extra `serve`."""
