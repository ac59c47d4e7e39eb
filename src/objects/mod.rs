//! Descriptors: file tables and one file per kind of open file description.
