//! Fixture programs of sockets.
