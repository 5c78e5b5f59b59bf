"""The user study: pictures of several methods, rated blind by people, in a browser."""
