//! Makes socket calls as a test tells it to: see `carnet_tests::puppet`.

fn main() -> std::io::Result<()> {
    carnet_tests::puppet::obey()
}
