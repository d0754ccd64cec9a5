//! What the code asks of each field of a JSON body, told in the document.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

use crate::http::json::{Demands, FromFields, demands};

/// Adds to a type's schema what reading it asks of its fields, and their other spellings.
pub fn tell<T: FromFields + ToSchema>(schemas: &mut BTreeMap<String, RefOr<Schema>>) {
    let Some(schema) = schemas.get_mut(T::name().as_ref()) else { return };
    let mut described = json!(schema);
    let Demands { fields, spellings } = demands::<T>();
    let properties = &mut described["properties"];
    for (name, demanded) in fields {
        refine(&mut properties[&name], demanded);
    }
    for (other, name) in spellings {
        let mut same = properties[&name].clone();
        same["description"] = Value::from(format!("Another spelling of `{name}`."));
        properties[other] = same;
    }
    *schema = serde_json::from_value(described).expect("a schema with bounds is one too");
}

fn refine(property: &mut Value, demanded: Value) {
    let Value::Object(demanded) = demanded else { return };
    for (key, value) in demanded {
        match (key.as_str(), value) {
            ("items", items) => refine(&mut property["items"], items),
            ("enum", Value::Array(mut choices)) => {
                // A field that may be absent may be null.
                if property["type"].as_array().is_some_and(|types| types.contains(&json!("null"))) {
                    choices.push(Value::Null);
                }
                property["enum"] = Value::Array(choices);
            }
            (_, value) => property[&key] = value,
        }
    }
}
