//! The conformance matrix: every kind of socket to every kind of destination through services in
//! every place, as one table. `cargo xtask conformance` prints it; `docs/conformance.md` says how to
//! read it.
//!
//! All cells share a laboratory: namespaces, an engine, two services, and servers at every
//! destination. First all of them are carried out, side by side; when nothing goes on any more,
//! what clients, services and servers have seen is put together and judged.

mod cells;
mod judge;
mod run;
mod table;

use cells::Cell;

#[test]
fn the_matrix() {
    let cells = Cell::all();
    let evidence = run::carry_out(&cells);
    let results = judge::judge(&cells, &evidence);
    println!("{}", table::Table { cells: &cells, results: &results });
    let bad = results.iter().filter(|result| !result.is_well()).count();
    assert!(bad == 0, "{bad} of {} cells are not as they should be: see above", cells.len());
}
