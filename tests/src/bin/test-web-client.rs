//! A web client that prints what became of each of its flows: see `carnet_tests::web`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plan = std::env::args().nth(1).ok_or("the plan is missing")?;
    carnet_tests::web::be_client(&serde_json::from_str(&plan)?);
    Ok(())
}
