//! Makes many socket calls at an order: see `carnet_tests::caller`.

fn main() -> std::io::Result<()> {
    carnet_tests::caller::obey()
}
