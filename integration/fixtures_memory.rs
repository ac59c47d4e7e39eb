//! Fixture programs of address spaces: what is mapped where, how, and with what in it.

crate::support::fixture_tests! {
    dirty_pages,
}
