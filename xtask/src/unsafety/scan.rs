//! The unsafe code of a file, with the reasons that stand beside it.

use anyhow::{Context, Result};
use proc_macro2::{Delimiter, Span, TokenStream, TokenTree};
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

/// What kind of unsafe code it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// An `unsafe` block.
    Block,
    /// A function, method or trait that is unsafe to call or implement: its reason is its contract.
    Contract,
    /// An `unsafe impl`.
    Impl,
    /// An `extern` block: names of foreign functions.
    Foreign,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Block, Self::Contract, Self::Impl, Self::Foreign];

    /// What stands over a column of them.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Block => "blocks",
            Self::Contract => "contracts",
            Self::Impl => "impls",
            Self::Foreign => "foreign",
        }
    }
}

/// One piece of unsafe code.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) kind: Kind,
    /// The item that it is or is in, by the names of all around it in the file.
    pub(super) item: String,
    pub(super) line: usize,
    /// Whether it is in a module of tests.
    pub(super) is_test: bool,
    /// Why it is sound, or what it asks for; empty if it does not say.
    pub(super) reason: String,
}

/// All unsafe code of a file with this text.
pub(super) fn scan(text: &str) -> Result<Vec<Found>> {
    let file = syn::parse_file(text).context("this is not Rust")?;
    let lines = text.lines().collect();
    let mut scanner = Scanner { lines, names: Vec::new(), tests: 0, within: 1, found: Vec::new() };
    scanner.visit_file(&file);
    Ok(scanner.found)
}

struct Scanner<'a> {
    lines: Vec<&'a str>,
    /// The names of the items around.
    names: Vec<String>,
    /// How many modules of tests are around.
    tests: usize,
    /// The first line of the innermost statement or item around.
    within: usize,
    found: Vec<Found>,
}

impl Scanner<'_> {
    fn note(&mut self, kind: Kind, at: Span, reason: String) {
        let (item, line) = (self.names.join("::"), at.start().line);
        self.found.push(Found { kind, item, line, is_test: self.tests > 0, reason });
    }

    /// The last comment that begins with `SAFETY:`, of those between the line and the comments and
    /// attributes over the statement or item that it is in.
    fn safety(&self, line: usize) -> String {
        let text = |number: usize| self.lines.get(number - 1).map_or("", |line| line.trim());
        let mut first = self.within.min(line);
        while first > 1 && (text(first - 1).starts_with("//") || text(first - 1).starts_with("#["))
        {
            first -= 1;
        }
        let Some(begin) = (first..=line).rev().find(|at| text(*at).starts_with("// SAFETY:"))
        else {
            return String::new();
        };
        let comment = (begin..).map(text).map_while(|line| line.strip_prefix("//"));
        let words = comment.flat_map(str::split_whitespace).skip(1);
        words.collect::<Vec<_>>().join(" ")
    }

    /// Visits what is below an item with this name, which begins at this place.
    fn below(&mut self, name: String, at: Span, visit: impl FnOnce(&mut Self)) {
        let outer = std::mem::replace(&mut self.within, at.start().line);
        self.names.push(name);
        visit(self);
        self.names.pop();
        self.within = outer;
    }

    /// Blocks among what is given to a macro, which need not be Rust otherwise.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut begun: Option<Span> = None;
        for token in tokens {
            let keyword = matches!(&token, TokenTree::Ident(word) if word == "unsafe");
            if let TokenTree::Group(group) = &token {
                if let Some(at) = begun.filter(|_| group.delimiter() == Delimiter::Brace) {
                    let reason = self.safety(at.start().line);
                    self.note(Kind::Block, at, reason);
                }
                self.tokens(group.stream());
            }
            begun = keyword.then(|| token.span());
        }
    }

    fn function(&mut self, signature: &syn::Signature, attributes: &[syn::Attribute]) {
        if matches!(signature.safety, syn::Safety::Unsafe(_)) {
            self.note(Kind::Contract, signature.span(), contract(attributes));
        }
    }
}

impl<'ast> Visit<'ast> for Scanner<'_> {
    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        let at = block.unsafe_token.span;
        let reason = self.safety(at.start().line);
        self.note(Kind::Block, at, reason);
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.tokens(call.tokens.clone());
    }

    fn visit_stmt(&mut self, statement: &'ast syn::Stmt) {
        let outer = std::mem::replace(&mut self.within, statement.span().start().line);
        visit::visit_stmt(self, statement);
        self.within = outer;
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        let outer = std::mem::replace(&mut self.within, arm.span().start().line);
        visit::visit_arm(self, arm);
        self.within = outer;
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let is_test = has_test_attribute(&module.attrs);
        self.tests += usize::from(is_test);
        self.below(module.ident.to_string(), module.span(), |scanner| {
            visit::visit_item_mod(scanner, module);
        });
        self.tests -= usize::from(is_test);
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.below(function.sig.ident.to_string(), function.span(), |scanner| {
            scanner.function(&function.sig, &function.attrs);
            visit::visit_item_fn(scanner, function);
        });
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.below(function.sig.ident.to_string(), function.span(), |scanner| {
            scanner.function(&function.sig, &function.attrs);
            visit::visit_impl_item_fn(scanner, function);
        });
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        self.below(function.sig.ident.to_string(), function.span(), |scanner| {
            scanner.function(&function.sig, &function.attrs);
            visit::visit_trait_item_fn(scanner, function);
        });
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.below(item.ident.to_string(), item.span(), |scanner| {
            if item.unsafety.is_some() {
                scanner.note(Kind::Contract, item.span(), contract(&item.attrs));
            }
            visit::visit_item_trait(scanner, item);
        });
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let of = type_name(&item.self_ty);
        let interface = item.trait_.as_ref().and_then(|(path, _)| path.segments.last());
        let name = match interface {
            Some(interface) if item.unsafety.is_some() => format!("{} for {of}", interface.ident),
            _ => of,
        };
        self.below(name, item.span(), |scanner| {
            if item.unsafety.is_some() {
                let reason = scanner.safety(item.span().start().line);
                scanner.note(Kind::Impl, item.span(), reason);
            }
            visit::visit_item_impl(scanner, item);
        });
    }

    fn visit_item_static(&mut self, item: &'ast syn::ItemStatic) {
        self.below(item.ident.to_string(), item.span(), |scanner| {
            visit::visit_item_static(scanner, item);
        });
    }

    fn visit_item_const(&mut self, item: &'ast syn::ItemConst) {
        self.below(item.ident.to_string(), item.span(), |scanner| {
            visit::visit_item_const(scanner, item);
        });
    }

    fn visit_item_foreign_mod(&mut self, block: &'ast syn::ItemForeignMod) {
        self.below("extern".to_owned(), block.span(), |scanner| {
            let reason = scanner.safety(block.span().start().line);
            scanner.note(Kind::Foreign, block.span(), reason);
        });
    }
}

/// Whether what has these attributes is there for tests only.
fn has_test_attribute(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|word| word == "test")
    })
}

/// The last name of a type's path.
fn type_name(of: &syn::Type) -> String {
    match of {
        syn::Type::Path(path) => {
            path.path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default()
        }
        syn::Type::Reference(reference) => type_name(&reference.elem),
        _ => "impl".to_owned(),
    }
}

/// What the documentation says under "Safety".
fn contract(attributes: &[syn::Attribute]) -> String {
    let documentation = attributes.iter().filter_map(|attribute| match &attribute.meta {
        syn::Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
            _ => None,
        },
        _ => None,
    });
    let lines: Vec<String> = documentation.map(|line| line.trim().to_owned()).collect();
    let section = lines.iter().skip_while(|line| *line != "# Safety").skip(1);
    let words = section.take_while(|line| !line.starts_with("# "));
    words.flat_map(|line| line.split_whitespace()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> Found {
        let mut found = scan(text).unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn a_block_has_the_comment_over_it_or_over_its_statement() {
        let over = only("fn f() {\n    // SAFETY: it is\n    // sound.\n    unsafe { g() }\n}\n");
        assert_eq!((over.kind, over.line), (Kind::Block, 4));
        assert_eq!((over.item.as_str(), over.reason.as_str()), ("f", "it is sound."));
        let statement =
            "impl T {\n fn f() {\n  // SAFETY: a.\n  let x =\n   g(1, unsafe { h() });\n }\n}\n";
        let found = only(statement);
        assert_eq!((found.item.as_str(), found.reason.as_str()), ("T::f", "a."));
        let inside = "fn f() {\n g(\n  // SAFETY: b.\n  unsafe { h() },\n );\n}\n";
        assert_eq!(only(inside).reason, "b.");
    }

    #[test]
    fn a_block_that_is_given_to_a_macro_counts() {
        let text = "fn f() {\n // SAFETY: c.\n assert!(g(unsafe { h() }), \"unsafe {}\", 1);\n}\n";
        assert_eq!(only(text).reason, "c.");
    }

    #[test]
    fn the_comment_of_another_statement_is_no_reason() {
        let text = "fn f() {\n // SAFETY: a.\n let x = 1;\n unsafe { g() }\n}\n";
        assert_eq!(only(text).reason, "");
        assert_eq!(only("// SAFETY: file.\n\nfn f() { unsafe { g() } }\n").reason, "");
    }

    #[test]
    fn functions_and_traits_have_a_contract_and_impls_a_comment() {
        let function =
            only("/// Does.\n///\n/// # Safety\n/// `p` is\n/// valid.\nunsafe fn f() {}\n");
        assert_eq!((function.kind, function.reason.as_str()), (Kind::Contract, "`p` is valid."));
        assert_eq!(only("unsafe trait T {}\n").reason, "");
        let item = only("// SAFETY: no threads.\nunsafe impl Send for a::Handle {}\n");
        assert_eq!((item.kind, item.item.as_str()), (Kind::Impl, "Send for Handle"));
        assert_eq!(item.reason, "no threads.");
        assert_eq!(only("unsafe extern \"C\" {\n fn f();\n}\n").kind, Kind::Foreign);
    }

    #[test]
    fn what_is_in_a_module_of_tests_is_told_apart() {
        let text = "#[cfg(test)]\nmod tests {\n fn f() { unsafe { g() } }\n}\n";
        let found = only(text);
        assert!(found.is_test);
        assert_eq!(found.item, "tests::f");
    }
}
