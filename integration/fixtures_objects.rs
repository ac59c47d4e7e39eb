//! Fixture programs of descriptors other than sockets.
