//! `t2m openapi`: the OpenAPI document on standard output.

use anyhow::Context;

pub fn run() -> anyhow::Result<()> {
    let document = crate::http::openapi::describe();
    println!("{}", document.to_pretty_json().context("writing the document")?);
    Ok(())
}
