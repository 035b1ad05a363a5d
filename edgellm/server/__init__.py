"""The HTTP server: endpoints of several APIs over one engine. Needs the extra `serve`."""
