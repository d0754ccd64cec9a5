//! Claims that go by two names.

use super::*;

#[test]
fn the_user_is_named_by_sub_else_by_user_id() {
    let table = [
        (json!("user_1"), Value::Null, Ok("user_1")),
        (Value::Null, json!("user_2"), Ok("user_2")),
        (json!("user_1"), json!("user_1"), Ok("user_1")),
        (json!("user_1"), json!("an id of the app's own"), Ok("user_1")),
        (json!("user_1"), json!(1), Ok("user_1")),
        (json!(""), json!("user_2"), Err(Rejected::Malformed("sub"))),
        (Value::Null, json!("../ada"), Err(Rejected::Malformed("user_id"))),
        (Value::Null, json!("mch_1"), Err(Rejected::TokenType)),
        (Value::Null, Value::Null, Err(Rejected::Malformed("sub"))),
    ];
    for (sub, user_id, expected) in table {
        let mut claims = claims_with("sub", sub);
        claims["user_id"] = user_id;
        let named = check(&signed(&claims)).map(|verified| verified.user_id);
        assert_eq!(named, expected.map(str::to_owned), "{claims}");
    }
    let mut claims = claims_without("sub");
    claims["user_id"] = json!("user_2");
    assert_eq!(check(&signed(&claims)).unwrap().user_id, "user_2");
}

#[test]
fn a_plan_named_after_a_tier_is_the_tier_that_no_other_claim_names() {
    for (plan, claimed, tier) in [
        ("u:premium", None, Some("premium")),
        ("o:enterprise", None, Some("enterprise")),
        ("o:enterprise,u:premium", None, Some("premium")),
        ("u:premium", Some("standard"), Some("standard")),
        ("u:Premium", None, None),
        ("u:premium_monthly", None, None),
        ("premium", None, None),
    ] {
        let mut claims = claims_with("pla", json!(plan));
        claims["subscription_tier"] = json!(claimed);
        assert_eq!(check(&signed(&claims)).unwrap().tier.as_deref(), tier, "{claims}");
    }
}
