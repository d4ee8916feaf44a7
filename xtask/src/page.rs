//! Pages of the documentation of which a part is generated: between two marks.

use anyhow::{Context, Result};

/// The page with `text` in the place of what it has between the marks; `name` is for the error.
pub(crate) fn with_part(name: &str, page: &str, marks: [&str; 2], text: &str) -> Result<String> {
    let [begin, end] = marks;
    let marked = || {
        let (before, rest) = page.split_once(begin)?;
        let (_, after) = rest.split_once(end)?;
        Some(format!("{before}{begin}{text}{end}{after}"))
    };
    marked().with_context(|| format!("{name} has not the marks between which the table stands"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_goes_between_its_marks() {
        let page = with_part("p", "before <b>old<e> after", ["<b>", "<e>"], "new").unwrap();
        assert_eq!(page, "before <b>new<e> after");
        let missing = with_part("p", "nothing", ["<b>", "<e>"], "").unwrap_err().to_string();
        assert!(missing.starts_with("p has not the marks"), "{missing}");
    }
}
