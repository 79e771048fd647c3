"""What a person does to a running topology: dead letters, tailing, status, publishing, checks. No printing here."""
